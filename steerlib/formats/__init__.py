"""File formats of vectors: tensors by layer, and what the file says of them, as plain text.

Below the core, which alone knows what a vector is: `SteeringVector.load` and `from_gguf` make one
of what is read here, and refuse what does not fit.
"""
