"""Linear heads that are solved: ridge, LDA, softmax regression, and stacks of them."""
