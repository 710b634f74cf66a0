"""The decoder: a stock `LlamaForCausalLM` with the paper's codebook embedding, and its way in and out of a folder."""
