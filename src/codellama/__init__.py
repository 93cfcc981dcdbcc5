"""Code Llama."""
