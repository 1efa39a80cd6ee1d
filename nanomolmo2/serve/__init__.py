"""A server of models: OpenAI's interface, a plain one, and a page for people.

Needs the extra `serve`. What a request may cost is in `settings`; who may send one in `security`,
how many at a time in `admission`, and with which models in `store`.
"""
