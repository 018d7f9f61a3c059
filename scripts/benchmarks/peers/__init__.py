"""The other contestants. They import nothing of Luthier."""
