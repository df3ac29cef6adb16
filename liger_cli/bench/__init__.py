"""`liger bench`: whole models side by side, and every op against its limit and its peers."""
