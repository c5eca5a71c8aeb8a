"""The CPU bench: our decoder, stock ONNX Runtime, llama.cpp and ik_llama.cpp side by side."""
