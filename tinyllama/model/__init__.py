"""The Llama decoder: its configuration and arithmetic (`config`, torch-free), its modules (`llama`), files (`hf`)."""
