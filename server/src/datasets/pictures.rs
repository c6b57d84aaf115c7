//! Picture files to pixels.

use fednano_shared::data::dataset::DataError;
use fednano_shared::data::picture::{Picture, Preprocess};
use image::{DynamicImage, ImageDecoder, ImageReader, Limits};
use std::fs::File;
use std::io::BufReader;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Larger pictures are refused before they are decoded: the models see a few hundred pixels a side.
const MAX_PIXELS: u64 = 64_000_000;

/// What a decoder may allocate: the picture with four channels of 16 bits, and as much again for its own buffers.
const MAX_DECODER_BYTES: u64 = MAX_PIXELS * 16;

/// Decode a picture; its format is guessed from its content. Turned as its EXIF data says, on white where it is
/// transparent, as on the page.
///
/// # Errors
/// The cause, without the name of the picture: the caller knows it.
pub fn read_picture(path: &Path) -> Result<Picture, String> {
    let file = File::open(path).map_err(|e| e.to_string())?;
    let mut reader = ImageReader::new(BufReader::new(file)).with_guessed_format().map_err(|e| e.to_string())?;
    if reader.format().is_none() {
        return Err("its content is not PNG, JPEG, WebP, BMP or GIF".into());
    }
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_DECODER_BYTES);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(|e| e.to_string())?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(format!("{width} x {height} pixels are more than the allowed {MAX_PIXELS}, shrink it"));
    }
    let orientation = decoder.orientation().map_err(|e| e.to_string())?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(|e| e.to_string())?;
    image.apply_orientation(orientation);
    let (width, height) = (image.width() as usize, image.height() as usize);
    Ok(Picture { width, height, rgb: on_white(image) })
}

/// As a browser's page draws it: what is transparent shows white.
fn on_white(image: DynamicImage) -> Vec<u8> {
    if !image.color().has_alpha() {
        return image.into_rgb8().into_raw();
    }
    let blend = |value: u8, alpha: u8| {
        let (value, alpha) = (u32::from(value), u32::from(alpha));
        ((value * alpha + 255 * (255 - alpha) + 127) / 255) as u8
    };
    image.into_rgba8().pixels().flat_map(|p| [0, 1, 2].map(|c| blend(p.0[c], p.0[3]))).collect()
}

/// Decode pictures on all cores, in their order; large ones are kept as a model with this preprocessing sees them.
///
/// # Errors
/// A picture that cannot be used; the rest is not looked at then.
pub(super) fn read_all(paths: &[PathBuf], preprocess: &Preprocess) -> Result<Vec<Picture>, DataError> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(paths.len());
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(path) = paths.get(index) else {
                return done;
            };
            let read = read_picture(path).and_then(|p| preprocess.fit(p).map_err(|e| e.to_string()));
            if read.is_err() {
                next.fetch_max(paths.len(), Ordering::Relaxed);
            }
            done.push((index, path, read));
        }
    };
    let mut done: Vec<_> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let done = workers.into_iter().map(|w| w.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        done.flatten().collect()
    });
    done.sort_by_key(|(index, ..)| *index);
    let named = |path: &PathBuf, cause| DataError::Picture { name: path.display().to_string(), cause };
    done.into_iter().map(|(_, path, read)| read.map_err(|cause| named(path, cause))).collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Folder, clip};
    use super::*;
    use image::{Rgb, RgbImage, Rgba, RgbaImage};
    use std::fs;

    #[test]
    fn reads_pixels_on_white() {
        let folder = Folder::new("pixels");
        folder.picture("a.png", 9);
        let expected = Picture { width: 3, height: 2, rgb: [9, 1, 2].repeat(6) };
        assert_eq!(read_picture(&folder.path("a.png")).unwrap(), expected);
        RgbaImage::from_pixel(3, 2, Rgba([9, 1, 2, 255])).save(folder.path("b.png")).unwrap();
        assert_eq!(read_picture(&folder.path("b.png")).unwrap(), expected);
        RgbaImage::from_pixel(3, 2, Rgba([0, 100, 200, 51])).save(folder.path("c.png")).unwrap();
        assert_eq!(read_picture(&folder.path("c.png")).unwrap().rgb, [204, 224, 244].repeat(6), "a fifth over white");
        RgbImage::from_pixel(1030, 2060, Rgb([9, 1, 2])).save(folder.path("d.png")).unwrap();
        let large = read_picture(&folder.path("d.png")).unwrap();
        assert_eq!((large.width, large.height), (1030, 2060));
        let kept = read_all(&[folder.path("d.png")], &clip()).unwrap();
        assert_eq!((kept[0].width, kept[0].height), (224, 448), "photos are kept small");
        fs::rename(folder.path("b.png"), folder.path("b.jpg")).unwrap();
        assert_eq!(read_picture(&folder.path("b.jpg")).unwrap(), expected, "the content decides, not the name");
    }

    #[test]
    fn huge_pictures_are_refused_before_decoding() {
        let folder = Folder::new("huge");
        // The header of a bitmap, 9000 x 9000 pixels of 24 bits; no pixels follow.
        let mut bytes = b"BM".to_vec();
        for value in [54_u32, 0, 54, 40, 9000, 9000, 1 | (24 << 16), 0, 0, 0, 0, 0, 0] {
            bytes.extend(value.to_le_bytes());
        }
        fs::write(folder.path("huge.bmp"), bytes).unwrap();
        let text = read_picture(&folder.path("huge.bmp")).unwrap_err();
        assert!(text.contains("9000 x 9000") && text.contains("shrink"), "{text}");
    }

    #[test]
    fn many_are_read_in_order_and_a_bad_one_is_named() {
        let folder = Folder::new("order");
        let paths: Vec<PathBuf> = (0..40_u8).map(|i| folder.path(&format!("{i}.png"))).collect();
        (0..40_u8).for_each(|i| folder.picture(&format!("{i}.png"), i));
        let red: Vec<u8> = read_all(&paths, &clip()).unwrap().iter().map(|p| p.rgb[0]).collect();
        assert_eq!(red, (0..40_u8).collect::<Vec<_>>());
        assert_eq!(read_all(&[], &clip()), Ok(Vec::new()));
        folder.text("7.png", "this is text");
        let text = read_all(&paths, &clip()).unwrap_err().to_string();
        assert!(text.contains("7.png' is not a picture that can be read"), "{text}");
    }
}
