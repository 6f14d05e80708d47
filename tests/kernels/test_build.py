import ctypes
import os
import subprocess
import sys
import tempfile
from dataclasses import replace

import pytest

from quantlab_kernels import build
from quantlab_kernels.build import BuildError, Recipe, build_library, cxx_command
from quantlab_kernels.native import open_library

SOURCE = '#include "answer.h"\nextern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }\n'


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source, header = tmp_path / "answer.cpp", tmp_path / "answer.h"
    source.write_text(SOURCE)
    header.write_text("#define ANSWER 42\n")
    return Recipe("answer", (source,), (header,), cxx_command())


def answer(path):
    return open_library(path).answer()


def test_a_library_is_compiled_once_and_then_found(recipe, monkeypatch):
    path = build_library(recipe)
    assert answer(path) == 42
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build_library(recipe) == path


def test_a_change_of_source_header_or_flags_makes_another_library(recipe):
    paths = {build_library(recipe)}
    recipe.headers[0].write_text("#define ANSWER 43\n")
    paths.add(build_library(recipe))
    recipe.sources[0].write_text(SOURCE + "// more\n")
    paths.add(build_library(recipe))
    last = build_library(Recipe(recipe.name, recipe.sources, recipe.headers, cxx_command(("-DANSWERED",))))
    paths.add(last)
    assert len(paths) == 4
    assert answer(last) == 43


def test_a_file_that_does_not_compile_is_reported_with_the_words_of_the_compiler(recipe, tmp_path):
    recipe.sources[0].write_text("int answer() { return unheard_of; }\n")
    with pytest.raises(
        BuildError, match=r"(?s)compiling answer ended with status 1.*answer\.cpp.*unheard_of"
    ) as caught:
        build_library(recipe)
    assert "g++" in str(caught.value)
    assert not list((tmp_path / "cache" / "kernels").glob("*.so"))
    assert not list((tmp_path / "cache" / "kernels").glob("*.tmp"))


def test_a_missing_compiler_is_named_with_the_remedy(recipe, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    missing = Recipe(recipe.name, recipe.sources, recipe.headers, cxx_command())
    with pytest.raises(BuildError, match=r"'no-such-compiler' does not run .*apt install g.*CXX"):
        build_library(missing)


def test_the_compiler_of_the_environment_may_have_arguments(monkeypatch):
    monkeypatch.setenv("CXX", "ccache g++")
    assert cxx_command(("-mavx2",))[:2] == ("ccache", "g++")
    assert cxx_command(("-mavx2",))[-1] == "-mavx2"


def test_a_cache_that_cannot_be_written_gives_way_to_a_private_folder(recipe, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path / "file" / "below"))
    path = build_library(recipe)
    assert path.parent == tmp_path / f"quantlab-kernels-{os.getuid()}"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert answer(path) == 42


def test_a_library_in_a_cache_that_cannot_be_written_is_used(recipe, monkeypatch):
    path = build_library(recipe)
    monkeypatch.setattr(build, "_locked", lambda *_: pytest.fail("tried to write"))
    assert build_library(recipe) == path


def test_no_folder_to_write_to_is_an_error_with_the_remedy(recipe, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUANTLAB_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"no folder .* can be written .*QUANTLAB_CACHE"):
        build_library(recipe)


def test_a_folder_that_everybody_can_write_is_not_trusted(recipe, tmp_path):
    path = build_library(recipe)
    path.parent.chmod(0o777)
    assert build_library(recipe).parent == tmp_path / f"quantlab-kernels-{os.getuid()}"


def test_two_processes_that_build_at_once_compile_once(recipe, tmp_path):
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-o*) echo run >> {log}; sleep 0.3;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o700)
    code = (
        "import sys, pathlib; sys.path[:] = eval(sys.argv[1])\n"
        "import importlib.util as u; s = u.spec_from_file_location('build', sys.argv[2]); m = u.module_from_spec(s)\n"
        "sys.modules['build'] = m; s.loader.exec_module(m)\n"
        "a, b = map(pathlib.Path, sys.argv[3:5])\n"
        "print(m.build_library(m.Recipe('answer', (a,), (b,), m.cxx_command())))\n"
    )
    arguments = [sys.executable, "-c", code, repr(sys.path), build.__file__, recipe.sources[0], recipe.headers[0]]
    environment = {**os.environ, "CXX": str(compiler)}
    processes = [subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate()[0].strip() for process in processes}
    assert len(paths) == 1
    assert log.read_text() == "run\n"
    assert ctypes.CDLL(paths.pop()).answer() == 42


def test_sources_that_change_while_they_are_compiled_make_no_library(recipe, tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"
    header = recipe.headers[0]
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-o*) echo "#define ANSWER 43" > {header};; esac\nexec g++ "$@"\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    changing = replace(recipe, command=cxx_command())
    with pytest.raises(BuildError, match="sources of answer changed while they were compiled"):
        build_library(changing)
    assert not list((tmp_path / "cache" / "kernels").glob("*.so"))
    assert answer(build_library(changing)) == 43


def test_a_damaged_file_is_reported_with_the_remedy(recipe):
    path = build_library(recipe)
    path.write_bytes(b"not a library")
    with pytest.raises(BuildError, match=r"answer.*\.so does not load .*delete it"):
        open_library(path)
