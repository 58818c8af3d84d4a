"""The placement search inside vLLM and SGLang: one file for each engine; all files say what they were tested with."""
