"""What URLs of buckets name, and which name nothing."""

import pytest

from replicate.errors import ConfigError
from replicated.store import open_store
from replicated.store.buckets import MAX_PREFIX_BYTES, parse_bucket_url


@pytest.mark.parametrize(
    ("url", "bucket", "root"),
    [
        ("s3://lab", "lab", ""),
        ("s3://lab/", "lab", ""),
        ("s3://my.lab-1/models", "my.lab-1", "models/"),
        ("s3://lab//Team A///x/", "lab", "Team A/x/"),
        ("s3://lab/Übung/100%25", "lab", "Übung/100%25/"),
        ("gs://lab_1/.hidden/x.y", "lab_1", ".hidden/x.y/"),
    ],
)
def test_bucket_and_prefix_are_what_the_url_says(url, bucket, root):
    place = parse_bucket_url(url)
    assert (place.bucket, place.root) == (bucket, root)
    assert parse_bucket_url(place.url) == place
    assert not place.url.endswith("/")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://", "not the name of a bucket: ''"),
        ("s3:///prefix", "not the name of a bucket: ''"),
        ("s3://ab", "not the name of a bucket: 'ab'"),
        ("s3://Upper/x", "3 to 63 lower-case letters"),
        ("s3://under_score", "not the name of a bucket"),
        ("s3://a..b", "not the name of a bucket"),
        ("s3://" + "a" * 64, "not the name of a bucket"),
        ("s3://arn:aws:s3:us-east-1:1:accesspoint/x", "use the alias of the access point"),
        ("s3://localhost:9000/bucket", "has no port.*AWS_ENDPOINT_URL"),
        ("s3://lab/x?versionId=1", r"cannot hold '\?'"),
        ("s3://lab/x#y", "cannot hold '#'"),
        ("s3://lab/x\\y", "cannot hold"),
        ("s3://lab/../x", "not a prefix"),
        ("s3://lab/./x", "not a prefix"),
        ("s3://lab/a\nb", "not a prefix"),
        ("s3://lab/\0", "not a prefix"),
        ("s3://lab/\udcff", "not a prefix"),
        ("s3://lab/" + "ü" * (MAX_PREFIX_BYTES // 2), "longer than"),
        ("gs://-lab", "not the name of a bucket"),
    ],
)
def test_impossible_urls_are_refused_with_the_reason(url, reason):
    with pytest.raises(ConfigError, match=reason):
        open_store(url, create=True)


def test_a_password_in_the_url_is_refused_and_not_repeated():
    with pytest.raises(ConfigError, match="user or a password") as caught:
        open_store("s3://me:hunter2@lab/x", create=True)
    assert "hunter2" not in str(caught.value)
