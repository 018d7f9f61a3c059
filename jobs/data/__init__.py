"""Data that can be answered for: looked at, cleaned, and described, before anything is trained on it.

sample      a row as the model will see it: tokens, what is learned of them, what is cut
show        … printed: `luthier jobs data show`
cli         `luthier jobs data …`
"""
