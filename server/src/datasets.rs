//! Data sets from files: question files, folders, and pictures decoded on all cores.

use anyhow::{Context, Result, bail};
use fednano_shared::data::dataset::{Dataset, assemble};
use fednano_shared::data::formats::parse;
use fednano_shared::data::picture::Picture;
use image::imageops::FilterType;
use image::{DynamicImage, ImageDecoder, ImageReader, Limits};
use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::BufReader;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Larger pictures are refused before they are decoded: the models see a few hundred pixels a side.
const MAX_PIXELS: u64 = 64_000_000;

/// What a decoder may allocate: the picture with four channels of 16 bits, and as much again for its own buffers.
const MAX_DECODER_BYTES: u64 = MAX_PIXELS * 16;

/// The shorter edge of a kept picture, pixels: the models look at less, and photos would fill the memory.
const SHORTEST: u32 = 1024;

/// What a question file is called when its folder holds other files too.
const QUESTION_FILES: [&str; 4] = ["questions.json", "questions.csv", "data.json", "data.csv"];

/// A data set with its held-out part.
#[derive(Debug, Clone)]
pub struct Splits {
    /// To learn from.
    pub train: Dataset,
    /// To measure with.
    pub test: Dataset,
}

/// Decode a picture; its format is guessed from its content. Turned as its EXIF data says, on white where it is
/// transparent, and at most [`SHORTEST`] pixels on its shorter edge, as on the page.
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
    let short = image.width().min(image.height());
    if short > SHORTEST {
        let scaled = |edge: u32| (u64::from(edge) * u64::from(SHORTEST) / u64::from(short)) as u32;
        image = image.resize_exact(scaled(image.width()), scaled(image.height()), FilterType::CatmullRom);
    }
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

/// Read a data set: a question file, or a folder that holds exactly one. Pictures lie in the folder of the question file or in
/// `images/` beside it.
///
/// # Errors
/// Which file, line, record or picture cannot be used, why, and what to do.
pub fn open(path: &Path) -> Result<Dataset> {
    let file = if path.is_dir() { question_file(path)? } else { path.to_path_buf() };
    let text = fs::read_to_string(&file).with_context(|| {
        format!("the questions cannot be read from {}; name a JSON or CSV file or its folder", file.display())
    })?;
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let fault = || format!("{} cannot be used", file.display());
    let entries = parse(&name, &text).with_context(fault)?;
    let names: BTreeSet<String> = entries.iter().map(|e| e.picture.clone()).collect();
    let names: Vec<String> = names.into_iter().collect();
    let mut pictures = read_pictures(file.parent().unwrap_or(Path::new("")), &names);
    let load = |name: &str| pictures.remove(name).unwrap_or_else(|| Err("it was not loaded".into()));
    assemble(entries, load).with_context(fault)
}

/// Read a folder with `train/` and `test/`, each as in [`open`].
///
/// # Errors
/// As [`open`], and for an absent part.
pub fn open_splits(dir: &Path) -> Result<Splits> {
    let part = |name: &str| {
        let folder = dir.join(name);
        if !folder.is_dir() {
            bail!(
                "{} has no folder {name}/; it needs train/ and test/, each with questions and pictures",
                dir.display()
            );
        }
        open(&folder)
    };
    Ok(Splits { train: part("train")?, test: part("test")? })
}

/// The one question file of a folder; the usual names win over other JSON and CSV files.
fn question_file(dir: &Path) -> Result<PathBuf> {
    let mut found: Vec<PathBuf> =
        QUESTION_FILES.iter().map(|name| dir.join(name)).filter(|path| path.is_file()).collect();
    if found.is_empty() {
        let unreadable = || format!("the folder {} cannot be read", dir.display());
        for item in fs::read_dir(dir).with_context(unreadable)? {
            let path = item.with_context(unreadable)?.path();
            let question = |e: &std::ffi::OsStr| e.eq_ignore_ascii_case("json") || e.eq_ignore_ascii_case("csv");
            if path.is_file() && path.extension().is_some_and(question) {
                found.push(path);
            }
        }
        found.sort();
    }
    if found.len() > 1 {
        let names: Vec<_> = found.iter().filter_map(|p| p.file_name()).map(|n| n.to_string_lossy()).collect();
        bail!("{} holds several question files ({}): name one", dir.display(), names.join(", "));
    }
    found.pop().with_context(|| {
        format!("{} holds no question file; put a questions.json or questions.csv there", dir.display())
    })
}

/// Decode pictures on all cores, each once.
fn read_pictures<'a>(dir: &Path, names: &'a [String]) -> HashMap<&'a str, Result<Picture, String>> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(names.len());
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
            done.push((name.as_str(), locate(dir, name).and_then(|path| read_picture(&path))));
        }
        done
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let done = workers.into_iter().map(|w| w.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        done.flatten().collect()
    })
}

/// A picture beside the question file or in `images/`.
fn locate(dir: &Path, name: &str) -> Result<PathBuf, String> {
    let places = [dir.join(name), dir.join("images").join(name)];
    let [beside, inside] = &places;
    let missing = format!("there is neither {} nor {}", beside.display(), inside.display());
    places.into_iter().find(|path| path.is_file()).ok_or(missing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{Rgb, RgbImage, Rgba, RgbaImage};

    /// A folder of one test, removed afterwards.
    struct Folder(PathBuf);

    impl Folder {
        fn new(test: &str) -> Self {
            let path = std::env::temp_dir().join(format!("fednano-datasets-{test}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn path(&self, name: &str) -> PathBuf {
            let path = self.0.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            path
        }

        fn text(&self, name: &str, text: &str) {
            fs::write(self.path(name), text).unwrap();
        }

        fn picture(&self, name: &str, value: u8) {
            RgbImage::from_pixel(3, 2, Rgb([value, 1, 2])).save(self.path(name)).unwrap();
        }

        fn fault(&self, name: &str) -> String {
            format!("{:#}", open(&self.0.join(name)).unwrap_err())
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            // A leftover in the temporary folder is no failure of the test.
            let _ = fs::remove_dir_all(&self.0);
        }
    }

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
        assert_eq!((large.width, large.height), (1024, 2048), "photos are kept small");
        fs::rename(folder.path("b.png"), folder.path("b.jpg")).unwrap();
        assert_eq!(read_picture(&folder.path("b.jpg")).unwrap(), expected, "the content decides, not the name");
    }

    #[test]
    fn opens_files_and_folders() {
        let folder = Folder::new("open");
        folder.picture("images/0.png", 10);
        folder.picture("images/1.png", 11);
        folder.picture("2.png", 12);
        folder.text("questions.json", r#"[["a?", "x", 1], ["b?", "y", 2], ["c?", "z", 1], ["d?", "x", 0]]"#);
        folder.text("other.json", "[]");
        let data = open(&folder.0).unwrap();
        assert_eq!(data.pictures.iter().map(|p| p.rgb[0]).collect::<Vec<_>>(), [11, 12, 10]);
        assert_eq!(data.samples.iter().map(|s| s.picture).collect::<Vec<_>>(), [0, 1, 0, 2]);
        assert_eq!(open(&folder.path("questions.json")).unwrap(), data);
        folder.text("some.csv", "picture,question,answer\n2.png,b?,y\n");
        assert_eq!(open(&folder.path("some.csv")).unwrap().samples[0].question, "b?");
    }

    #[test]
    fn many_pictures_keep_their_questions() {
        let folder = Folder::new("many");
        let mut csv = String::from("picture,question,answer\n");
        for i in 0..60_u8 {
            folder.picture(&format!("{i}.png"), i);
            csv.push_str(&format!("{i}.png,{i},a\n{}.png,{},a\n", i / 2, i / 2));
        }
        folder.text("data.csv", &csv);
        let data = open(&folder.0).unwrap();
        assert_eq!((data.pictures.len(), data.samples.len()), (60, 120));
        for sample in &data.samples {
            assert_eq!(data.pictures[sample.picture].rgb[0].to_string(), sample.question);
        }
    }

    #[test]
    fn bad_pictures_are_named() {
        let folder = Folder::new("bad");
        folder.text("x.png", "this is text");
        let noise = RgbImage::from_fn(64, 64, |x, y| Rgb([(x * y) as u8, (x * 7 + y * 13) as u8, (x ^ (y * 5)) as u8]));
        noise.save(folder.path("whole.png")).unwrap();
        let bytes = fs::read(folder.path("whole.png")).unwrap();
        fs::write(folder.path("torn.png"), &bytes[..bytes.len() / 2]).unwrap();
        for name in ["x.png", "torn.png", "gone.png"] {
            folder.text("q.csv", &format!("picture,question,answer\nwhole.png,q,a\n{name},q,a\n"));
            let text = folder.fault("q.csv");
            assert!(text.contains(&format!("'{name}' is not a picture that can be read")), "{text}");
            assert!(text.contains("q.csv") && text.contains("remove its questions"), "{text}");
        }
        assert!(folder.fault("q.csv").contains("neither"));
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
    fn question_files_must_be_clear() {
        let folder = Folder::new("clear");
        assert!(folder.fault("").contains("no question file"));
        folder.text("a.csv", "");
        folder.text("b.JSON", "");
        let text = folder.fault("");
        assert!(text.contains("a.csv, b.JSON") && text.contains("name one"), "{text}");
        folder.text("data.csv", "");
        folder.text("questions.json", "");
        assert!(folder.fault("").contains("questions.json, data.csv"));
        assert!(folder.fault("missing.json").contains("missing.json"));
        assert!(folder.fault("a.csv").contains("empty"));
    }

    #[test]
    fn opens_train_and_test() {
        let folder = Folder::new("splits");
        folder.picture("train/images/0.png", 1);
        folder.text("train/questions.json", r#"[["a?", "x", 0]]"#);
        let text = format!("{:#}", open_splits(&folder.0).unwrap_err());
        assert!(text.contains("no folder test/"), "{text}");
        folder.picture("test/0.png", 2);
        folder.text("test/set.csv", "image,question,answer\n0.png,b?,y\n");
        let splits = open_splits(&folder.0).unwrap();
        assert_eq!((splits.train.pictures[0].rgb[0], splits.test.pictures[0].rgb[0]), (1, 2));
        assert_eq!(splits.test.samples[0].answer, "y");
    }
}
