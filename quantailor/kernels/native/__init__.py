"""Our own machine code, where torch has no operator for one pass: built from C on this machine at first use."""
