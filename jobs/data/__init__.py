"""Data that can be answered for: looked at, cleaned, and described, before anything is trained on it.

hits        what a check has found in a text, and the text folded so that offsets stay
personal    personal data and secrets in a text: the one `find` for all kinds
numbers     telephone numbers, cards, IBAN, IP addresses
identities  national identity numbers
secrets     keys, tokens, passwords
names       names of people, where spaCy is installed
replace     marks or surrogates where personal data stood
markers     words of hate, and phrases that command a model
near        near duplicates: MinHash, bands, groups
"""
