"""Kernels: host code in C++ (`_native`, built by CMake from kernels/csrc) and GPU kernels with their
references.

What lives here: code that runs fast and knows nothing of phi4r. What may not: an import of phi4r, or, in this
file, of anything at all; the C++ module is free of torch, GPU kernels import torch and triton in their own
files.
"""
