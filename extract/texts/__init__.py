"""From a data set, file or folder to texts and labels."""
