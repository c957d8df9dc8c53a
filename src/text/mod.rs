/*! Text sets and files -> token windows. */
