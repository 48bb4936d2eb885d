"""Files of a checkpoint in the format of torch.distributed.checkpoint (DCP), and loading them collectively."""
