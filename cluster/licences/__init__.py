"""Licences: what a use of a model, its data and its teachers is allowed, and what it obliges to. Not legal advice.

facts         what is known of each licence, from configs/policy/licences.yaml; how a tag is found in it
organisation  who we are and what was signed off, from configs/policy/organisation.yaml
verdict       one licence, one use: allowed, with duties, needs review, refused; pure
chain         all that a model was made from: the strictest, and what cannot be combined; pure
card          what a card of the Hub says
evidence      what a model's folder shows of its licence beside that
gate          facts and policy read once: what every command passes
notice        the NOTICE that goes with what is made, and licence files
model_card    the model card that goes with it, in the Hub's format
audit         all that a store holds, as rows
bom           and as a CycloneDX ML-BOM
cli           `luthier licences …`
"""
