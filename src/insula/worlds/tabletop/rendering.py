"""Off-screen images of a MuJoCo scene, without a window. EGL is tried first, then OSMesa; `MUJOCO_GL` overrides.

Multisampling, shadows and reflections are off: on a CPU they cost more than everything else at 64 x 64. Without them
both cameras take 1.2 ms, twice as long as a step of physics. Mesa is told to draw in the thread that asks: pictures of
this size are drawn sooner than its own threads have taken them.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import weakref
from typing import Any

import mujoco
import numpy as np

from insula.errors import GLError

BACKENDS = ("egl", "osmesa")  # the driver's, or Mesa's on the CPU; both draw without an X server
PACKAGES = "libegl1 libgl1-mesa-dri libosmesa6"
_OPENING = threading.Lock()  # what a failed backend leaves behind is forgotten for the whole process


def _forget_pyopengl() -> None:
    """PyOpenGL binds to one platform at import; forget it so that another can be tried."""
    os.environ.pop("PYOPENGL_PLATFORM", None)
    bound = ("OpenGL", "mujoco.egl", "mujoco.osmesa")
    for name in [n for n in sys.modules if n.startswith(bound)]:
        del sys.modules[name]


def _open(backend: str, size: int) -> Any:
    context = importlib.import_module(f"mujoco.{backend}").GLContext(size, size)
    context.make_current()
    return context


def open_context(size: int) -> Any:
    """A current OpenGL context able to draw `size` x `size` pixels. Raises GLError naming what to install."""
    chosen = os.environ.get("MUJOCO_GL", "").lower()
    if chosen and chosen not in BACKENDS:
        raise GLError(f"MUJOCO_GL={chosen!r}: expected one of {', '.join(BACKENDS)}, or leave it unset")

    os.environ.setdefault("LP_NUM_THREADS", "0")  # read when Mesa's software renderer starts
    failures = []
    for backend in (chosen,) if chosen else BACKENDS:
        try:
            context = _open(backend, size)
        except Exception as error:  # ctypes, PyOpenGL and MuJoCo each raise their own kinds here
            failures.append(f"{backend}: {type(error).__name__}: {error}")
            _forget_pyopengl()
        else:
            os.environ["MUJOCO_GL"] = backend  # MuJoCo's own loader reads it to find the same library
            return context

    raise GLError(
        "cannot draw off-screen, no OpenGL backend works (" + "; ".join(failures) + f"). On Debian or Ubuntu: apt-get "
        f"install {PACKAGES}"
    )


def _release(gl: Any, context: mujoco.MjrContext) -> None:
    gl.make_current()  # MuJoCo frees textures in whatever context is current, which may be another renderer's
    context.free()
    gl.free()


class Renderer:
    """Draws square images of one model. `close()` frees the GL context; drawing afterwards raises GLError."""

    def __init__(self, model: mujoco.MjModel, size: int) -> None:
        # Before MjrContext, which makes its buffers by them: changed later, they are ignored without a word.
        model.vis.quality.offsamples = 0  # four samples a pixel are the default, drawn and then averaged
        model.vis.quality.shadowsize = 0  # no shadows are drawn; the default map takes 64 MB per environment
        self.model = model
        self.size = size

        with _OPENING:
            self._gl: Any = open_context(size)
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)

        self._scene = mujoco.MjvScene(model, maxgeom=200)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION, mujoco.mjtRndFlag.mjRND_HAZE):
            self._scene.flags[flag] = False

        self._viewport = mujoco.MjrRect(0, 0, size, size)
        self._option = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._buffer = np.empty((size, size, 3), np.uint8)

        # Closed explicitly, or when nobody holds it, or at exit: then at the latest, before EGL itself is taken down.
        self._release = weakref.finalize(self, _release, self._gl, self._context)

    def draw(self, data: mujoco.MjData, cameras: tuple[str, ...]) -> dict[str, np.ndarray]:
        """One fresh uint8 image [size, size, 3] per camera name. Raises GLError after `close`."""
        if self._gl is None:
            raise GLError("the renderer is closed")

        self._gl.make_current()  # evaluation has sixteen of these side by side
        images = {}
        for k, name in enumerate(cameras):
            self._camera.fixedcamid = self.model.camera(name).id
            if k == 0:
                category = mujoco.mjtCatBit.mjCAT_ALL
                mujoco.mjv_updateScene(self.model, data, self._option, None, self._camera, category, self._scene)
            else:  # same geoms, another eye
                mujoco.mjv_updateCamera(self.model, data, self._camera, self._scene)
            mujoco.mjr_render(self._viewport, self._scene, self._context)
            mujoco.mjr_readPixels(self._buffer, None, self._viewport, self._context)
            images[name] = self._buffer[::-1].copy()  # OpenGL counts rows from the bottom

        return images

    def close(self) -> None:
        """Free the GL context; a second call does nothing."""
        self._release()
        self._gl = None
