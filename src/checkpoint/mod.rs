/*! Bytes on disk <-> named tensors. */
