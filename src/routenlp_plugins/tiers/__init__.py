"""What can be called: a text classifier, a local model through llama.cpp, an OpenAI-compatible endpoint."""
