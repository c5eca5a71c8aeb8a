"""The CPU bench: it compares our decoder, stock ONNX Runtime, llama.cpp and ik_llama.cpp."""
