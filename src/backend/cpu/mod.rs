/*! The CPU backend. */
