"""Starting a run where its nodes are; the scripts that run there lie beside, readable and runnable by hand."""
