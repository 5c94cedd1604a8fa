"""One video on several devices: members that exchange tensors, plans that divide the work, and split tokens and frames."""
