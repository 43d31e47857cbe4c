"""Files as named tensors: safetensors, PyTorch pickles, PEFT adapters; the atomic writer."""
