"""llama.cpp's server dialect: /completion, /tokenize, /detokenize, /lora-adapters, /props; nested errors."""
