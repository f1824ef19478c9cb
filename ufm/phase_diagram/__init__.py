"""Which classes collapse at which weight decay: certified solves on a grid."""
