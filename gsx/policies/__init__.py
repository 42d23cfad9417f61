"""The keep rules of exports: a file for each policy, from what is asked for to what the manifest says."""
