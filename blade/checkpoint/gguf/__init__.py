"""GGUF files: read without trust, told in Hugging Face's words, served in their own blocks."""

from blade.checkpoint.gguf.file import GGMLType, GGUFFile, TensorInfo, read_gguf, read_gguf_parts

__all__ = ["GGMLType", "GGUFFile", "TensorInfo", "read_gguf", "read_gguf_parts"]
