"""OpenAI's dialect: chat completions, completions and models, as the official SDK expects them."""
