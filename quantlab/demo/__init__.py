"""A small trained Llama that comes with the package, so that every recipe runs without a download."""
