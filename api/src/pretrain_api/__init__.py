"""Types that every part of pretrain-operator shares."""
