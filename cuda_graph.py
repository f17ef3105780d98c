"""A training step as one CUDA graph: a single launch in place of several hundred."""

import gc

import torch

from runtime import is_out_of_memory

STEPS_BEFORE_CAPTURE = 5


class StepGraph:
    """Calls a step as it is a few times, records it once, and from there on replays the recording.

    At this batch size many kernels finish before the next could be launched. The first steps run as
    they are, on a stream of their own, as capture demands: they allocate what lasts, and cuDNN
    chooses its algorithms. A step takes no arguments and returns nothing: what changes from step to
    step it reads from tensors on the device, and it must not read a value back.

    Args:
        step: a function without arguments.
        on_failure: called with the reason if the step cannot be recorded; steps then go on being
            launched as they are, which is slower and does the same.
    """

    def __init__(self, step, on_failure):
        self.step, self.on_failure = step, on_failure
        self.stream = torch.cuda.Stream()
        self.calls = 0
        self.graph = None

    def __call__(self):
        self.calls += 1
        if self.calls == STEPS_BEFORE_CAPTURE + 1:
            self.capture()
        if self.graph:
            self.graph.replay()
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.step()
        torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self):
        gc.collect()  # an earlier stage's graph must not be freed in the middle of this one
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        random_state, stream = generator.clone_state(), torch.cuda.current_stream()
        try:
            # Other threads, such as tqdm's, may do as they like.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.step()
        except RuntimeError as error:
            cause = error.__context__ or error  # ending a capture that failed fails in its turn
            if is_out_of_memory(cause) or not isinstance(cause, Exception):
                raise cause from None
            # What the capture has left behind: its stream, and a generator in capture.
            torch.cuda.set_stream(stream)
            generator.graphsafe_set_state(random_state)
            self.on_failure((str(cause) or type(cause).__name__).splitlines()[0])
        else:
            self.graph = graph
