"""Language models: the only importer of transformers and peft."""
