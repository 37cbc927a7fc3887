"""What people do with features: fit, sweep, and fit from texts as scikit-learn does.

The modules are imported by name: each needs torch.
"""
