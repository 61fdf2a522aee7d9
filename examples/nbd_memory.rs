//! Serves a plain sparse file over NBD: what the server costs without a chain of layers below.
//!
//!     nbd_memory SOCKET FILE

use std::error::Error as StdError;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use nix::fcntl::{FallocateFlags, fallocate};
use vellum_base::block::{BlockDevice, Durability, Extent, ExtentKind, ZeroMode, check_range};
use vellum_base::error::ResultExt;
use vellum_export::nbd::{Export, Server, ServerConfig, bind_unix};

struct FileDevice {
    file: File,
    size: u64,
}

impl BlockDevice for FileDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> vellum_base::Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        self.file
            .read_exact_at(buf, offset)
            .context(|| "reading the file")
    }

    fn write_at(&self, buf: &[u8], offset: u64, durability: Durability) -> vellum_base::Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        self.file
            .write_all_at(buf, offset)
            .context(|| "writing the file")?;
        match durability {
            Durability::Buffered => Ok(()),
            Durability::Durable => self.flush(),
        }
    }

    fn flush(&self) -> vellum_base::Result<()> {
        self.file.sync_data().context(|| "syncing the file")
    }

    fn discard(&self, offset: u64, len: u64) -> vellum_base::Result<()> {
        self.write_zeroes(offset, len, ZeroMode::MayUnmap, Durability::Buffered)
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        mode: ZeroMode,
        durability: Durability,
    ) -> vellum_base::Result<()> {
        check_range(offset, len, self.size)?;
        let how = match mode {
            ZeroMode::MayUnmap => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            ZeroMode::KeepAllocated => FallocateFlags::FALLOC_FL_ZERO_RANGE,
        } | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.file, how, offset as i64, len as i64).context(|| "zeroing the file")?;
        match durability {
            Durability::Buffered => Ok(()),
            Durability::Durable => self.flush(),
        }
    }

    fn extents(&self, offset: u64, len: u64, _max: usize) -> vellum_base::Result<Vec<Extent>> {
        check_range(offset, len, self.size)?;
        Ok(vec![Extent {
            offset,
            len,
            kind: ExtentKind::Data,
        }])
    }
}

fn main() -> Result<(), Box<dyn StdError>> {
    let mut args = std::env::args_os().skip(1);
    let (Some(socket), Some(path), None) = (args.next(), args.next(), args.next()) else {
        return Err("usage: nbd_memory SOCKET FILE".into());
    };
    let file = File::options().read(true).write(true).open(path)?;
    let size = file.metadata()?.len();
    let server = Server::new(ServerConfig::default())?;
    server.add_export(Export::new("file", Arc::new(FileDevice { file, size })))?;
    let (listener, _file) = bind_unix(Path::new(&socket))?;
    server.serve_unix(listener)?;
    Ok(())
}
