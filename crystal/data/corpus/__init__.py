"""Corpora: what there is to train on, found, fetched, extracted and filtered, document by document."""
