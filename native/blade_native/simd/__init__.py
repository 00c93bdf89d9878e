"""The CPU op set in C++: kernels from `../cpu`, one shared library per instruction set, called through ctypes.

`library.load()` picks the best library this machine can run (or the one BLADE_CPU_ISA names); `ops.SimdOps` and
`attention.SimdAttention` are the op set and the paged attention over it. Nothing is imported here: building needs no
torch, and running needs no compiler.
"""
