"""What can go wrong, as one tree: catch `EdgeError` and the rest is a bug.

EdgeError
├── SettingsError      a settings file or flag is wrong; the user edits it
├── ArtifactError      a checkpoint, table or bundle is missing, damaged or of another version
├── ParityError        an exported graph disagrees with its reference
├── DoesNotFit         the work needs more room than there is
├── BackendError       ONNX Runtime or TensorRT refused to load or to run
├── ExpertUnavailable  an expert's record could not be read or is damaged
├── TrainingFailed     a loss is not finite, a process died: the run stopped, what it kept is whole
├── UsageError         a call that this object cannot take now
└── AudioError         sound that cannot be read, heard or played
    └── DeviceLost     a microphone or loudspeaker is not there, or no longer

A message says what was expected, what was found and the way out.
"""


class EdgeError(Exception):
    """The base of every error that a user or an integrator may want to catch."""


class SettingsError(EdgeError):
    """A settings file or a flag holds something that we cannot use."""


class ArtifactError(EdgeError):
    """A checkpoint, calibration table or bundle is missing, damaged or of another version."""


class ParityError(EdgeError):
    """An exported graph disagrees with its reference by more than the stated tolerance."""


class DoesNotFit(EdgeError):
    """The work needs more memory, context or disk than there is."""


class BackendError(EdgeError):
    """An inference backend refused to load or run a graph, or gave values that are not finite."""


class ExpertUnavailable(EdgeError):
    """An expert's record could not be read or is damaged; a miss never changes the output."""


class TrainingFailed(EdgeError):
    """A training run cannot go on: a loss is not finite or explodes, or a process has died."""


class UsageError(EdgeError):
    """A call that this object cannot take now: it is closed, busy, or another process's."""


class AudioError(EdgeError):
    """A sound file or device cannot be read or written, or holds nothing that we can use."""


class DeviceLost(AudioError):
    """A microphone or loudspeaker is not there, or has stopped; it may come back."""
