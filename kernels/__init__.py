"""Triton kernels, installed as `cosmos_fast.kernels`; imports torch and triton only. One file per op stem."""
