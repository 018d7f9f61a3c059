"""Data that can be answered for: looked at, cleaned, and described, before anything is trained on it.

rules       what is looked for, and what is done about it: configs/policy/data.yaml
request     what is asked of a set: files, rules, tokenizer; its digest
parts       files to parts of rows, on the driver, a few at a time
tidy        white space, Unicode, HTML; pure
examine     every check that a row alone decides
sensitive   personal data, secrets and markers of a row, by the rules
stage       one Ray task: a part examined, and its findings in the store
table       what all rows of a set have in common a few bytes each for: digests, lengths, languages
whole       duplicates and leakage over the table; pure
similar     near duplicates and near leakage, with signatures in a file
balance     how often a row is taken, so that groups weigh what they shall; pure
prepare     all of it, in order: parts, the whole, the rows that stay, the card
card        what was found, done and left, as a record and as text
prepared    the sets that a store has, what a recipe asks for, and their rows on this machine
augment     more rows for a small set, each marked as synthetic
progress    rows, rows a second, and how long it still takes
search      where a text is in the data that a store has
forget      what was trained on it, and all that came of that
forget_cli  its command
cli         `luthier jobs data …`
hits        what a check has found in a text, and the text folded so that offsets stay
personal    personal data and secrets in a text: the one `find` for all kinds
numbers     telephone numbers, cards, IBAN, IP addresses
identities  national identity numbers
secrets     keys, tokens, passwords
names       names of people, where spaCy is installed
embedded    a text that is JSON, masked so that it stays JSON
replace     marks or surrogates where personal data stood
markers     words of hate, and phrases that command a model
near        near duplicates: MinHash, bands, groups
sample      a row as the model will see it: tokens, what is learned of them, what is cut
show        … printed: `luthier jobs data show`
"""
