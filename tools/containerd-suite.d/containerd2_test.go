//go:build containerd2
// +build containerd2

package suite

import (
	"context"

	"github.com/containerd/containerd/api/services/snapshots/v1"
	root "github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
)

// Where containerd 2 keeps what the tests need.

type snapshotter = root.Snapshotter

var (
	runSuite      = testsuite.SnapshotterSuite
	withNamespace = namespaces.WithNamespace
)

func newClient(conn *grpc.ClientConn, name string) snapshotter {
	return proxy.NewSnapshotter(snapshots.NewSnapshotsClient(conn), name)
}

func (d *daemon) keys(ctx context.Context) (keys []string, err error) {
	err = d.client.Walk(ctx, func(_ context.Context, info root.Info) error {
		keys = append(keys, info.Name)
		return nil
	})
	return
}
