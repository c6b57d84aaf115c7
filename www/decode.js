// Files to RGBA, by the browser's own decoders, in the worker.

/** As natively: larger pictures are refused. */
const MOST_PIXELS = 64_000_000;
/** Rows drawn at once: some browsers have no canvas for a whole photo. */
const STRIP = 512;

/** RGBA of one picture file in its own size, on white where it is transparent. Rust resizes it, so that no canvas does. */
export async function decode(file) {
  let bitmap;
  try {
    // The bytes' own colours, as Pillow gives them: a profile would change them by more than a level.
    bitmap = await createImageBitmap(file, { colorSpaceConversion: 'none' });
  } catch (e) {
    const cause = (e.message || e.name).replace(/\.$/, '');
    throw new Error(`'${file.name}' cannot be read as a picture (${cause}); choose a PNG, JPEG, WebP, GIF or BMP file in its place`);
  }
  const { width, height } = bitmap;
  try {
    if (width * height > MOST_PIXELS) {
      throw new Error(`'${file.name}' has ${width} x ${height} pixels, more than the allowed ${MOST_PIXELS}; shrink it`);
    }
    const rgba = new Uint8Array(4 * width * height);
    const canvas = new OffscreenCanvas(width, Math.min(STRIP, height));
    const context = canvas.getContext('2d', { willReadFrequently: true, alpha: false });
    context.imageSmoothingEnabled = false;
    for (let top = 0; top < height; top += STRIP) {
      const rows = Math.min(STRIP, height - top);
      context.fillStyle = '#fff';
      context.fillRect(0, 0, width, rows);
      context.drawImage(bitmap, 0, top, width, rows, 0, 0, width, rows);
      rgba.set(context.getImageData(0, 0, width, rows).data, 4 * width * top);
    }
    return { width, height, rgba };
  } finally {
    bitmap.close();
  }
}

/** Each of [{name, file}] to `keep(name, picture)`; what is not a picture is not fatal: `faults` are [{name, message}]. */
export async function decodeAll(files, keep, progress) {
  const faults = [];
  let added = 0;
  for (const [index, { name, file }] of files.entries()) {
    try {
      keep(name, await decode(file));
      added += 1;
    } catch (e) {
      faults.push({ name, message: e.message });
    }
    progress({ done: index + 1, all: files.length });
  }
  return { added, faults };
}
