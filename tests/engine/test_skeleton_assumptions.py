"""What quantlab.skeleton and quantlab.experts assume about parts of transformers that are not public.

Nothing of quantlab is imported here: when a release of transformers breaks quantlab, the names of the failing tests
say which assumption no longer holds.
"""

import inspect
from dataclasses import fields
from importlib import import_module

import pytest

FUNCTIONS = {
    "transformers.conversion_mapping.get_model_conversion_mapping": ["model"],
    "transformers.core_model_loading.convert_and_load_state_dict_in_model": ["model", "state_dict", "load_config"],
    "transformers.core_model_loading.rename_source_key": [
        "source_key",
        "weight_renamings",
        "weight_converters",
        "base_model_prefix",
        "meta_state_dict",
    ],
    "transformers.initialization.no_init_weights": [],
    "transformers.modeling_utils.PreTrainedModel.tie_weights": ["missing_keys", "recompute_mapping"],
    "transformers.modeling_utils.PreTrainedModel._get_dtype_plan": ["dtype"],
    "transformers.modeling_utils.PreTrainedModel.get_decoder": [],
    "transformers.modeling_utils.PreTrainedModel.get_output_embeddings": [],
}
CLASSES = {
    "transformers.core_model_loading.WeightRenaming": [],
    "transformers.core_model_loading.WeightConverter": [],
    "transformers.modeling_utils.LoadStateDictConfig": ["dtype", "dtype_plan", "weight_mapping"],
    "transformers.core_model_loading.LoadStateDictInfo": ["missing_keys", "mismatched_keys", "conversion_errors"],
}


def resolve(path):
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError:
        return getattr(resolve(module), name)


@pytest.mark.parametrize("path", FUNCTIONS)
def test_a_function_is_where_it_was_and_takes_the_same_arguments(path):
    assert set(FUNCTIONS[path]) <= set(inspect.signature(resolve(path)).parameters)


@pytest.mark.parametrize("path", CLASSES)
def test_a_class_is_where_it_was_and_has_the_same_fields(path):
    found = resolve(path)
    assert set(CLASSES[path]) <= ({field.name for field in fields(found)} if CLASSES[path] else set())


@pytest.fixture
def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=1, num_key_value_heads=1, num_local_experts=2))


def test_a_model_names_the_classes_of_its_blocks(mixtral):
    assert {type(block).__name__ for block in mixtral.model.layers} <= set(mixtral._no_split_modules)


def test_a_model_says_which_weights_are_tied_to_which():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1, tie_word_embeddings=True))
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


def test_fused_experts_say_how_they_are_laid_out(mixtral):
    experts = mixtral.model.layers[0].mlp.experts
    layout = ["has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated"]
    assert [getattr(experts, name) for name in layout] == [True, False, False, False, True]
    assert callable(experts._apply_gate)
    assert (tuple(experts.gate_up_proj.shape), tuple(experts.down_proj.shape)) == ((2, 16, 8), (2, 8, 8))
    parameters = list(inspect.signature(type(experts).forward).parameters)
    assert parameters == ["self", "hidden_states", "top_k_index", "top_k_weights"]
