"""Imports of boto3 and its data files, for the process that ranks are forked from if checkpoints are in S3."""

from pretrain_store import s3

s3.preload()
