"""Text to tokens and back on the web's side, in child processes: the web process itself never imports llama_cpp."""
