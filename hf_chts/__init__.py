"""hf_chts: sparse language-model pretraining with Cannistraci-Hebb Training inside Hugging Face Transformers."""
