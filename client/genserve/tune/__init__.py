"""`genserve tune`: settings that are faster on this machine, found by measuring servers of its own."""
