from rq_ep.model.text import corpus


def test_every_domain_has_text_to_train_on_and_text_held_out() -> None:
    train, held_out = corpus.texts("train"), corpus.texts("held-out")
    for domain in corpus.DOMAINS:
        assert sum(map(len, train[domain])) > 200_000
        assert sum(map(len, held_out[domain])) > 10_000


def test_no_document_is_in_both_splits() -> None:
    for domain in corpus.DOMAINS:
        names = [document.name for document in corpus.documents(domain)]
        assert len(set(names)) == len(names)
        assert not set(corpus.texts("train")[domain]) & set(corpus.texts("held-out")[domain])


def test_a_domain_stops_at_its_limit(monkeypatch) -> None:
    monkeypatch.setattr(corpus, "MAX_DOMAIN_BYTES", 100_000)
    sizes = [len(document.text.encode()) for document in corpus.documents("code")]
    assert 0 < sum(sizes) <= 100_000


def test_headers_come_from_torch_when_python_has_none(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    first = next(corpus._c())
    assert first[0].endswith(".h")
    assert "#" in first[1]


def test_files_are_sorted_by_split_and_domain(tmp_path) -> None:
    corpus.write_corpus(tmp_path)
    for split in corpus.SPLITS:
        for domain, texts in corpus.texts(split).items():
            written = sorted(path.read_text(encoding="utf-8") for path in (tmp_path / split / domain).iterdir())
            assert written == sorted(texts)
