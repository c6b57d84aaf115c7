// Files to RGBA, by the browser's own decoders, in the worker.

/** The shorter edge of a kept picture, pixels: the model looks at less, and photos would fill the memory. */
const SHORTEST = 512;

/** RGBA of one picture file, on white where it is transparent. */
export async function decode(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch (e) {
    const cause = (e.message || e.name).replace(/\.$/, '');
    throw new Error(`'${file.name}' cannot be read as a picture (${cause}); choose a PNG, JPEG, WebP, GIF or BMP file in its place`);
  }
  const scale = Math.min(1, SHORTEST / Math.min(bitmap.width, bitmap.height));
  const width = Math.max(1, Math.round(bitmap.width * scale));
  const height = Math.max(1, Math.round(bitmap.height * scale));
  const context = new OffscreenCanvas(width, height).getContext('2d', { willReadFrequently: true });
  context.fillStyle = '#fff';
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = 'high';
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  return { width, height, rgba: new Uint8Array(context.getImageData(0, 0, width, height).data.buffer) };
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
