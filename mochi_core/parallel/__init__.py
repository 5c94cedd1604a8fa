"""One video on several devices: members that exchange tensors, plans of who does what, tokens and frames shared out."""
